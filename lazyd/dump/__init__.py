# SPDX-License-Identifier: MIT
"""Dumping: from a stopped task to images, or to a page server."""
