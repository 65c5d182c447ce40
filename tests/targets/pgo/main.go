// Spends its time behind an interface call, and in a function that Go inlines only where a profile
// says that the call is hot. The argument is the number of rounds, a few milliseconds each.
package main

import (
	"os"
	"strconv"
)

type rule interface {
	score(word uint64) uint64
}

type mixing struct{ seed uint64 }

type parity struct{ seed uint64 }

const (
	adding = iota
	turning
	multiplying
	spreading
	folding
)

func (m *mixing) score(word uint64) uint64 {
	return combine(turning, word, m.seed)
}

func (p parity) score(word uint64) uint64 {
	for bit := uint64(2); bit > 0; bit >>= 1 {
		word ^= word >> bit
	}
	return word & p.seed & 1
}

// combine is beyond the budget for inlining; where it is inlined, one case of it is left.
func combine(kind int, word, seed uint64) uint64 {
	switch kind {
	case adding:
		return (word + seed) ^ (word+seed)>>7
	case turning:
		return (word<<7 | word>>57) ^ seed
	case multiplying:
		return word*(seed|1) ^ (word*(seed|1))>>32
	case spreading:
		word = (word | word<<16) & 0x0000ffff0000ffff
		word = (word | word<<8) & 0x00ff00ff00ff00ff
		word = (word | word<<4) & 0x0f0f0f0f0f0f0f0f
		return word ^ seed
	case folding:
		word ^= word >> 32
		word ^= word >> 16
		word ^= word >> 8
		return word & 0xff & seed
	}
	return word / (seed | 1)
}

func total(rules []rule, words []uint64) uint64 {
	sum := uint64(0)
	for _, each := range rules {
		for _, word := range words {
			sum += each.score(word)
		}
	}
	return sum
}

var stop = func() {}

func main() {
	rounds, err := strconv.Atoi(os.Args[1])
	if err != nil {
		panic(err)
	}
	words := make([]uint64, 1<<16)
	for i := range words {
		words[i] = uint64(i) * 0x9e3779b97f4a7c15
	}
	rules := []rule{&mixing{3}, &mixing{5}, &mixing{7}, &mixing{11}, &mixing{13}, parity{1}}
	sum := uint64(0)
	for i := 0; i < rounds; i++ {
		sum += total(rules, words)
	}
	stop()
	os.Stdout.WriteString(strconv.FormatUint(sum, 10) + "\n")
}
