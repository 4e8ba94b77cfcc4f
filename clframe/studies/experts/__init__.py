"""From a trained dense model to one of experts: what ``clframe moefy`` does, step by step."""
