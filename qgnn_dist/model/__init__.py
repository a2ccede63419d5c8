# SPDX-License-Identifier: Apache-2.0
"""The perceptron, the forward pass, and the packed file."""
