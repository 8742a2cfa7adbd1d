"""Questions asked of stored features: which images are alike, which labels look wrong, what lies apart, what to label next."""
