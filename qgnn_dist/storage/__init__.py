# SPDX-License-Identifier: Apache-2.0
"""Object stores, and a host's cache of their parts."""
