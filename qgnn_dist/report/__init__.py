# SPDX-License-Identifier: Apache-2.0
"""`qgnn report`: what runs left in their folders, as one HTML page: collected, drawn, put together."""
