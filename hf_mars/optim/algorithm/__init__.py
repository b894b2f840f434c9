"""The paper's formulas (arXiv:2411.10438), one file each: functions of lists of tensors that know nothing of groups,
states, devices or processes. `composed.py` calls them in the paper's order.
"""
