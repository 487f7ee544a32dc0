"""The fields of ``TrainingArguments``, in small dataclasses by what they are about.

Their order is that of transformers 5.23, in ``training``, ``compute``, ``watching``, ``running``; what Forgather adds
comes last, in ``own``. A field's ``help`` says what it does here, and :mod:`forgather.ml.trainer.refusals` which values
are not honoured.
"""
