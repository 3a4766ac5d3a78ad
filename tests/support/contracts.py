"""The contract suite for models that take more than a second to compile."""

import pytest

from surgery_core.testing import OperationContract


class SlowToCompile(OperationContract):
    """The suite, with the tests that compile the model marked."""

    @pytest.mark.slow
    def test_compiled_it_computes_the_same(self):
        super().test_compiled_it_computes_the_same()

    @pytest.mark.slow
    def test_compiled_with_its_gradients_it_computes_the_same(self):
        super().test_compiled_with_its_gradients_it_computes_the_same()

    @pytest.mark.slow
    def test_what_was_compiled_before_follows_apply_and_revert(self):
        super().test_what_was_compiled_before_follows_apply_and_revert()
