// Compiled in by benchmarks: writes a profile of Go's own runtime into the file CPUPROFILE.
package main

import (
	"os"
	"runtime/pprof"
)

func init() {
	if name := os.Getenv("CPUPROFILE"); name != "" {
		file, err := os.Create(name)
		if err != nil {
			panic(err)
		}
		if err := pprof.StartCPUProfile(file); err != nil {
			panic(err)
		}
		stop = pprof.StopCPUProfile
	}
}
