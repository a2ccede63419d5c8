# SPDX-License-Identifier: Apache-2.0
"""Classes of every node of a store, by a packed model."""
