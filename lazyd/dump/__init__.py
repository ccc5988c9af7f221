# SPDX-License-Identifier: MIT
"""Dump tasks into images."""
