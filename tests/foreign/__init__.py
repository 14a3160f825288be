"""The tests of transformers and PEFT, passed by the model classes here.

`python -m tests.foreign` runs all of them; `test_foreign.py` runs those that tell most.
"""
