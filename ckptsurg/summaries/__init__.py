"""What a verify came to, for the pages of a pipeline: text out, no file touched."""
