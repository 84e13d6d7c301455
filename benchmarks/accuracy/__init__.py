"""The accuracy study: one routing decision per token against layer-wise routing, LoRA and others, on seven domains.

`study.py` runs it. A run trains one method at one learning rate from one seed and scores multiple-choice items; it leaves one small
JSON file, so that a study is done a piece at a time.
"""
