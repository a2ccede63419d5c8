# SPDX-License-Identifier: Apache-2.0
"""Ray: placement, actors, jobs, restarts. The only room that imports it."""
