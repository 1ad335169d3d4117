"""A pytest plugin (``-p tests.kernels.by_default``): tests run with the kernels switched on."""

import pallas_kernels

pallas_kernels.BY_DEFAULT = True
