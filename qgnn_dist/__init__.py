# SPDX-License-Identifier: Apache-2.0
"""Deep graph neural networks over many hosts, with messages of 1-8 bits. Importing this starts nothing."""
from __future__ import annotations

__version__ = "0.1.0"
__all__ = ["__version__"]
