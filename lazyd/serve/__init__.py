# SPDX-License-Identifier: MIT
"""The page server: takes dumps into a directory of images, and gives out their pages."""
