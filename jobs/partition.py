# SPDX-License-Identifier: Apache-2.0
"""Entry point for `ray job submit -- python jobs/partition.py SOURCE --parts N --out STORE …`: a job."""
import sys

from qgnn_dist.cli import main

if __name__ == "__main__":
    sys.argv[1:1] = ["partition"]
    main()
