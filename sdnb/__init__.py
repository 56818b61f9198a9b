"""sdnb: fine-tune Stable Diffusion from a notebook, and measure how fast a machine does it.

Importing this package loads nothing; each module loads what it needs. The way data flows is the order to read them in:
config → models, data, runs → train → ranks → launch → metrics → plots → report.
"""

__version__ = "0.1.0"
