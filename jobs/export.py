# SPDX-License-Identifier: Apache-2.0
"""Entry point for `ray job submit -- python jobs/export.py RUN --out MODEL …`: a job."""
import sys

from qgnn_dist.cli import main

if __name__ == "__main__":
    sys.argv[1:1] = ["export"]
    main()
