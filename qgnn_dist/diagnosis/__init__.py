# SPDX-License-Identifier: Apache-2.0
"""What quantising does to each stage and layer of a model."""
