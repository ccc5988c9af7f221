# SPDX-License-Identifier: MIT
"""Where bytes come from that are not in local images: a page server."""
