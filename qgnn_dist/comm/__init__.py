# SPDX-License-Identifier: Apache-2.0
"""Workers talk: group, wire format, exchange. The only room that calls a collective."""
