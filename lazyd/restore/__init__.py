# SPDX-License-Identifier: MIT
"""Build a task again from its images, without CRIU."""
