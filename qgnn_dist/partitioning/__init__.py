# SPDX-License-Identifier: Apache-2.0
"""Who owns a node, and the store that is built from it."""
