"""`pytest -p reference`: the tests on the PyTorch reference of the operators.

As where the extension is not built. The folder of this file must be in PYTHONPATH.
"""

import sys

sys.modules["freeanchor.layers._C"] = None  # type: ignore[assignment]  # it cannot be found
