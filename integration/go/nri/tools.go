//go:build tools

// The validation suite of the CRI that has specs of NRI.
package main

import (
	_ "github.com/onsi/ginkgo/v2"
	_ "github.com/onsi/gomega"
	_ "sigs.k8s.io/cri-tools/pkg/validate"
)
