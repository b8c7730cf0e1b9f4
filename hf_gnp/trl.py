"""
Has TRL's trainers and their arguments with the penalty: `GNPSFTTrainer`, `GNPSFTConfig`, `GNPDPOTrainer`, and so on.

```python
>>> from hf_gnp.trl import GNPSFTConfig, GNPSFTTrainer

>>> args = GNPSFTConfig(output_dir="out", packing=True)
>>> GNPSFTTrainer("Qwen/Qwen3-0.6B", args, train_dataset=train_dataset).train()
```
"""

import trl

from .wrap import classes_of


__getattr__ = classes_of(trl, __name__)
