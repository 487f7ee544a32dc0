"""The laws that training by a pure step obeys, each as a check of one line for your own model and loss.

.. code-block:: python

    from forgather_fn import testing

    testing.check_step(plan, batch)  # what one batch can tell
    testing.check_evaluation(plan, eval_dataset)
    testing.check_data(ff.batches(dataset, batch_size=32), plan=plan)
    testing.check_resume(plan, ff.batches(dataset, batch_size=32))
    testing.check_worlds(plan, ff.batches(dataset, batch_size=32))

Each raises an ``AssertionError`` that names the leaf, the step and the sizes, and changes nothing of what it is given:
modules are copied. A few samples and a small model tell as much as large ones, and sooner.
"""

from forgather_fn.testing.accumulation import check_accumulation as check_accumulation
from forgather_fn.testing.data import check_data as check_data
from forgather_fn.testing.donation import check_donation as check_donation
from forgather_fn.testing.evaluation import check_evaluation as check_evaluation
from forgather_fn.testing.nonfinite import check_nonfinite as check_nonfinite
from forgather_fn.testing.purity import check_purity as check_purity
from forgather_fn.testing.resume import check_checkpoint as check_checkpoint
from forgather_fn.testing.resume import check_resume as check_resume
from forgather_fn.testing.step import check_step as check_step
from forgather_fn.testing.worlds import check_worlds as check_worlds
