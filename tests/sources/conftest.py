"""Detailed assertion messages in the contract of sources."""

import pytest

pytest.register_assert_rewrite("source_contract")
