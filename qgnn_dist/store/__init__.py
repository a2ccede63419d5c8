# SPDX-License-Identifier: Apache-2.0
"""The graph on disk: written once, checked, mapped."""
