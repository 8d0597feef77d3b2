package main

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"math/big"
	"net"
	"os"
	"path/filepath"
	"strings"
	"time"
)

// lifetime is that of a test cluster with room for one that stands for weeks.
const lifetime = 365 * 24 * time.Hour

// writeCertificates makes the keys of a new cluster in the folder args[0]: a CA, the API server's
// certificate for the names and addresses args[1:], an administrator's client certificate, and the
// pair of keys that service-account tokens are signed and checked with. For every node=NAME among
// args it makes the client certificate NAME with which that node's kubelet is known.
func writeCertificates(args []string) error {
	if len(args) < 2 {
		return errors.New("give a folder and the API server's names and addresses")
	}
	folder := args[0]
	var hosts, nodes []string
	for _, arg := range args[1:] {
		if name, isNode := strings.CutPrefix(arg, "node="); isNode {
			nodes = append(nodes, name)
		} else {
			hosts = append(hosts, arg)
		}
	}
	authority := certificate("stagetune-test-ca", "")
	authority.IsCA = true
	authority.BasicConstraintsValid = true
	authority.KeyUsage = x509.KeyUsageCertSign | x509.KeyUsageDigitalSignature
	ca, err := writePair(folder, "ca", authority, nil)
	if err != nil {
		return err
	}

	server := certificate("kube-apiserver", "")
	server.ExtKeyUsage = []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth}
	for _, host := range hosts {
		if address := net.ParseIP(host); address != nil {
			server.IPAddresses = append(server.IPAddresses, address)
		} else {
			server.DNSNames = append(server.DNSNames, host)
		}
	}
	if _, err := writePair(folder, "apiserver", server, ca); err != nil {
		return err
	}

	if err := writeClient(folder, "admin", "stagetune-test-admin", "system:masters", ca); err != nil {
		return err
	}
	for _, name := range nodes {
		// The names by which the API server's Node authorizer takes a client for a node.
		if err := writeClient(folder, name, "system:node:"+name, "system:nodes", ca); err != nil {
			return err
		}
	}

	accounts, err := writeKey(folder, "service-accounts")
	if err != nil {
		return err
	}
	public, err := x509.MarshalPKIXPublicKey(accounts.Public())
	if err != nil {
		return err
	}
	return writePEM(folder, "service-accounts.pub", "PUBLIC KEY", public)
}

func writeClient(folder, file, name, organization string, ca *pair) error {
	client := certificate(name, organization)
	client.ExtKeyUsage = []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth}
	_, err := writePair(folder, file, client, ca)
	return err
}

func certificate(name, organization string) *x509.Certificate {
	// A clock that is a little behind must not refuse a certificate made this second.
	now := time.Now().Add(-time.Hour)
	subject := pkix.Name{CommonName: name}
	if organization != "" {
		subject.Organization = []string{organization}
	}
	return &x509.Certificate{
		Subject:   subject,
		NotBefore: now,
		NotAfter:  now.Add(lifetime),
		KeyUsage:  x509.KeyUsageDigitalSignature,
	}
}

// pair is a certificate with its key.
type pair struct {
	certificate *x509.Certificate
	key         crypto.Signer
}

// writePair has template signed by the CA, or by itself without one, and writes NAME.crt and
// NAME.key. The certificate it returns is the one that was written, with the identifiers of its
// keys: strict clients want them in what it signs.
func writePair(folder, name string, template *x509.Certificate, ca *pair) (*pair, error) {
	key, err := writeKey(folder, name)
	if err != nil {
		return nil, err
	}
	if ca == nil {
		ca = &pair{template, key}
	}
	template.SerialNumber, err = rand.Int(rand.Reader, new(big.Int).Lsh(big.NewInt(1), 120))
	if err != nil {
		return nil, err
	}
	signed, err := x509.CreateCertificate(
		rand.Reader, template, ca.certificate, key.Public(), ca.key,
	)
	if err != nil {
		return nil, err
	}
	written, err := x509.ParseCertificate(signed)
	if err != nil {
		return nil, err
	}
	return &pair{written, key}, writePEM(folder, name+".crt", "CERTIFICATE", signed)
}

func writeKey(folder, name string) (crypto.Signer, error) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, err
	}
	encoded, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		return nil, err
	}
	return key, writePEM(folder, name+".key", "PRIVATE KEY", encoded)
}

func writePEM(folder, name, kind string, content []byte) error {
	block := pem.EncodeToMemory(&pem.Block{Type: kind, Bytes: content})
	return os.WriteFile(filepath.Join(folder, name), block, 0o600)
}
