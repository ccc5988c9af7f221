# SPDX-License-Identifier: MIT
"""lazyd: fills the memory of a restored process on demand."""
