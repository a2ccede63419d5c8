# SPDX-License-Identifier: Apache-2.0
"""Training by torch operations, on GPUs."""
