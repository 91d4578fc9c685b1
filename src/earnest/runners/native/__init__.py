"""The native runner: compiled kernels that read weights as panels, on any processor.

`isa.py` says which instruction-set tier runs, `ops.py` gives single kernels their Python shape,
`twin.py` is their numpy specification.
"""
