# SPDX-License-Identifier: Apache-2.0
"""Layers between the scores of nodes, and the mathematics of the multiplier."""
