"""Results in words: numbers, yardsticks, and which values share a column."""

from ddpm_jax.evaluation.summary import in_words, number, yardsticks


def test_a_score_of_noise_above_that_of_the_data_tells_nothing():
  others = {"data": 1.8, "noise": 2.9}
  assert "says nothing" in in_words("Score", "classifier_score", 3.4, others)
  assert "says nothing" not in in_words("Score", "classifier_score", 3.4, {"data": 3.9, "noise": 2.9})


def test_numbers():
  values = [0.0, 64.0, 12345678.0, 3.14159, 0.00012346, 1.5e-7, -2.5, 123456.7]
  assert [*map(number, values)] == ["0", "64", "12,345,678", "3.142", "0.0001235", "1.5e-7", "-2.5", "123,457"]


def test_only_measures_with_a_better_direction_have_yardsticks():
  spread = {"data": {"values": {"set_size": 9, "classifier_kid_std": 0.2, "classifier_kid": 0.1}}}
  assert yardsticks({"yardsticks": spread}) == {"classifier_kid": {"data": 0.1}}
