# SPDX-License-Identifier: Apache-2.0
"""What a graph needs on given hosts: memory, bytes, seconds."""
