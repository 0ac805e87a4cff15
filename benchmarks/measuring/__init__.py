"""What `benchmarks/speed.py` is made of; and `deepseek`, which `benchmarks/scale.py` measures with.

inputs -> places -> tools -> running -> results -> table | chart. Only what runs as a process of its own (inputs, peers)
imports numpy and frameworks: a child's largest resident memory counts from what its parent had when it forked.
"""
