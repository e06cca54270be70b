# Copyright 2026 The evolmm-trl authors
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.


import json
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from evolmm_trl import AdaptiveKL
from evolmm_trl.kl import sampled_kl


def controller(**kwargs):
    return AdaptiveKL(**{"beta": 1e-3, "target": 0.02, "rate": 0.1, **kwargs})


def test_the_mean_of_the_sampled_estimate_is_the_kl():
    policy, reference = torch.tensor([0.5, 0.3, 0.2]), torch.tensor([0.2, 0.2, 0.6])
    estimate = sampled_kl(policy.log(), reference.log())
    assert (estimate >= 0).all()
    assert (policy * estimate).sum() == pytest.approx((policy * (policy / reference).log()).sum())


def test_beta_follows_the_papers_equation():
    kl = controller()
    assert kl.update(0.06) == pytest.approx(1e-3 * math.exp(0.1 * (0.06 - 0.02) / 0.02))
    assert kl.beta == pytest.approx(1e-3 * math.exp(0.2))


def test_beta_rises_above_the_target_falls_below_it_and_stays_at_it():
    assert controller().update(0.021) > 1e-3
    assert controller().update(0.019) < 1e-3
    assert controller().update(0.02) == 1e-3


def test_a_kl_of_zero_takes_beta_down_by_the_rate():
    assert controller().update(0.0) == pytest.approx(1e-3 * math.exp(-0.1))


def test_updates_add_up():
    kl = controller()
    for measured in (0.01, 0.03, 0.02, 0.05):
        kl.update(measured)
    assert kl.beta == pytest.approx(1e-3 * math.exp(0.1 * (-0.5 + 0.5 + 0 + 1.5)))


def test_beta_does_not_leave_its_bounds():
    low, high = controller(min_beta=9e-4), controller(max_beta=2e-3)
    assert [low.update(0.0) for _ in range(5)][-1] == 9e-4
    assert [high.update(1.0) for _ in range(5)][-1] == 2e-3


def test_beta_comes_back_from_a_bound_at_once():
    kl = controller(max_beta=2e-3)
    kl.update(10.0)
    assert kl.update(0.0) == pytest.approx(2e-3 * math.exp(-0.1))


def test_a_rate_of_zero_keeps_beta():
    assert controller(rate=0.0).update(5.0) == 1e-3


def test_a_beta_of_zero_stays_zero():
    assert controller(beta=0.0, min_beta=0.0).update(5.0) == 0.0


@settings(deadline=None)
@given(st.floats(-1e300, 1e300) | st.just(math.inf) | st.just(-math.inf))
def test_no_number_overflows_or_takes_beta_out_of_its_bounds(measured):
    assert 1e-8 <= controller().update(measured) <= 1e2


def test_a_kl_that_is_not_a_number_is_refused_and_changes_nothing():
    kl = controller()
    with pytest.raises(ValueError, match="NaN.*[Rr]esume from the last checkpoint"):
        kl.update(math.nan)
    assert kl.beta == 1e-3


@pytest.mark.parametrize(
    "wrong",
    [
        {"beta": -1e-3},
        {"target": 0.0},
        {"target": -0.02},
        {"rate": -0.1},
        {"min_beta": -1e-8},
        {"min_beta": 2.0, "max_beta": 1.0},
        {"beta": math.nan},
        {"target": math.nan},
    ],
)
def test_settings_that_make_no_controller_are_refused(wrong):
    with pytest.raises(ValueError, match="expected beta >= 0, target > 0, rate >= 0"):
        controller(**wrong)


def test_a_restored_controller_goes_on_as_the_saved_one():
    saved, restored = controller(), controller()
    saved.update(0.1)
    restored.load_state_dict(json.loads(json.dumps(saved.state_dict())))
    assert restored.update(0.03) == saved.update(0.03) != controller().update(0.03)
