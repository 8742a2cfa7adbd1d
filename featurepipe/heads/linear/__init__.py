"""Linear classifiers on features of any size: logistic regression, linear SVC, ridge and LDA, and how they are fitted."""
