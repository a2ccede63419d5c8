# SPDX-License-Identifier: Apache-2.0
"""The loop, checkpoints, and what watches a run."""
