# SPDX-License-Identifier: Apache-2.0
"""Torch modules for a training loop of one's own."""
