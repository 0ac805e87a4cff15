"""Pages to look at: a plan, an output, or what a comparison found, as one HTML file that needs nothing else.

composing    from paths to a page: which document is asked for, and what has to be measured for it
  compared     what a page says of a comparison, as plain data; nothing is read
  model        what a page says, and that of a plan or an output
    maps         the tensors block by block, sizes true to scale; blocks that are alike together
    heat         blocks x roles, and how many tensors changed how much
    entries      what a page knows of one tensor
    places       a name -> its block, and its role there
  changes      by how much one tensor changed, in a stream
rendering    a page -> HTML
"""
