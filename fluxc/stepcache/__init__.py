"""The step cache: trace what steps change, fit TeaCache's polynomial, find threshold and schedule, measure the frontier."""
