# SPDX-License-Identifier: Apache-2.0
"""Quantisers, and the one bit order of codes."""
