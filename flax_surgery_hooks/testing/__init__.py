"""Laws that edits and optimizers obey, as plain functions for any test runner; imported only when asked for.

Tables and what holds between them: optimizers (`OPTIMIZERS`), edits (`EDITS`), surgeries of the catalogue
(`SURGERIES`) and rules; and laws of training on (`STABILITY`). A third party adds a row and inherits all the laws, an
optimizer by `check` and `check_stability`, a surgery by `check_surgery`:

>>> import optax
>>> from flax_surgery_hooks import testing
>>> mine = testing.OptimizerRow("mine", lambda: optax.chain(optax.trace(0.9), optax.scale(-0.1)))
>>> testing.check(mine, testing.EDITS["scale"], "transport")

A law that fails raises `AssertionError` with the fields and edits for which it does.
"""

from flax_surgery_hooks.testing.edits import EDITS as EDITS
from flax_surgery_hooks.testing.edits import EditRow as EditRow
from flax_surgery_hooks.testing.laws import check as check
from flax_surgery_hooks.testing.laws import findings as findings
from flax_surgery_hooks.testing.optimizers import OPTIMIZERS as OPTIMIZERS
from flax_surgery_hooks.testing.rows import Exempt as Exempt
from flax_surgery_hooks.testing.rows import Holds as Holds
from flax_surgery_hooks.testing.rows import OptimizerRow as OptimizerRow
from flax_surgery_hooks.testing.stability import STABILITY as STABILITY
from flax_surgery_hooks.testing.stability import check_stability as check_stability
from flax_surgery_hooks.testing.surgeries import SURGERIES as SURGERIES
from flax_surgery_hooks.testing.surgeries import SurgeryRow as SurgeryRow
from flax_surgery_hooks.testing.surgeries import check_surgery as check_surgery
