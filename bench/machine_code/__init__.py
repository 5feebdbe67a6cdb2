"""Reading the machine code of CUDA kernels; ``python -m bench.inspect_cuda`` is the command.

compilation.py   the tools, and from sources to machine code
sass.py          from what cuobjdump prints to kernels and their instructions
flow.py          control flow: blocks, calls, natural loops
loops.py         hot loops: what a loop costs for each 16 bytes, and how many loads are in flight
names.py         what a kernel's name says of it
limits.py        what kernels must not do
tables.py        how they are shown, and the table that is kept
"""
