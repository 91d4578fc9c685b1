"""Evaluation: the model as lm-evaluation-harness (`lm_eval`) takes one.

`earnest.evaluate.harness.EarnestLM` is the model; `earnest.evaluate.startup` makes it known to
`lm_eval` by its name.
"""
