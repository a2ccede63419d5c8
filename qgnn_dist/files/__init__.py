# SPDX-License-Identifier: Apache-2.0
"""Files: read with distrust, written whole."""
