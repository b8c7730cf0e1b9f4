"""
Has sentence-transformers' trainers and their arguments with the penalty: `GNPSentenceTransformerTrainer`,
`GNPSentenceTransformerTrainingArguments`, `GNPCrossEncoderTrainer`, and so on.

```python
>>> from hf_gnp.sentence_transformers import GNPCrossEncoderTrainer, GNPCrossEncoderTrainingArguments

>>> args = GNPCrossEncoderTrainingArguments(output_dir="out")
>>> GNPCrossEncoderTrainer(model, args, train_dataset=train_dataset).train()
```
"""

import sentence_transformers

from .wrap import classes_of


__getattr__ = classes_of(sentence_transformers, __name__)
