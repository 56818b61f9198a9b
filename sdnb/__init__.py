"""sdnb: fine-tune Stable Diffusion from a notebook, and measure how fast a machine does it.

The way data flows is the order to read the modules in:
settings → config → models, data, runs → throughput → metrics → imported, memory, encoders, batches, checkpoints,
observer → train → terminal, ranks → launch → compare → plots → report.
"""

import os
import warnings

__version__ = "0.1.0"

# A notebook is a document: what the libraries only remark while they load stays out of it. A user's choice goes first.
for _library in ("TRANSFORMERS", "DIFFUSERS", "DATASETS"):
    os.environ.setdefault(f"{_library}_VERBOSITY", "error")
os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
warnings.filterwarnings("ignore", message="IProgress not found")
